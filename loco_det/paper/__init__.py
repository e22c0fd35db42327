"""The paper's tables and figures as commands: its numbers, the plan of what makes ours, its cost, and a page."""

"""Numbers from predictions; knows no engine."""

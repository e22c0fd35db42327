"""What every command needs, whatever it does."""

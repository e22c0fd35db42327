"""What every command needs: configuration, logging, files, processes."""

"""What is on disk: model folders, exported programs, files written whole."""

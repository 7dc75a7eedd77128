"""Pages: received, classified, described, and put back."""

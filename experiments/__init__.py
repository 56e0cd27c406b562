"""What the library is used for: training, comparing and measuring."""

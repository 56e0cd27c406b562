"""What is measured on networks while they train or once they are trained.

Nothing here trains a comparison's report or a single run's folder; it uses their parts.
"""

"""Numbers and images in; curves, contact sheets and reports out."""

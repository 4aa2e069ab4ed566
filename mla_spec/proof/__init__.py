"""What proves the suite itself: honest kernels pass, planted faults do not."""

"""What people look at: previews, heatmaps, contact sheets."""

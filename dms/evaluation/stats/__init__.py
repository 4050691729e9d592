"""From scores to result rows: resampling, intervals, comparisons."""

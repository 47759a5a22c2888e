"""From files to batches, and the number each benchmark asks for. Knows no network and no task."""

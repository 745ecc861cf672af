"""The border to other packages. Effect handlers appear below this folder only."""

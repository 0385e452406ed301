"""Drawing a layout as SVG, or as text for a terminal."""

"""Visualisation: coloured label maps, overlays, reports and videos."""

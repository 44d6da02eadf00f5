"""What people look at: label maps in colours, overlays, reports and videos."""

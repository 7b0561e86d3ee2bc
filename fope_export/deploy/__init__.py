"""A folder that puts a bundle behind a production server."""

"""Built-in sources, one file each, named after `data.source`."""

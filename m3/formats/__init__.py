"""Published formats, one file each: what the file is called is the name of the format."""

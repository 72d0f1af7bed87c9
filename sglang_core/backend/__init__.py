"""What a device is to the core: the plugin interface, discovery, kernel selection, and the built-in reference backend."""

"""Where the package plugs into other libraries' models; nothing here is imported by itself."""

"""The commands of ``fusemlp``, a module each; ``cli`` parses the command line and calls them."""

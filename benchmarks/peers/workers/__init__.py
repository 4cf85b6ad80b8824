"""One engine a module: the process that holds it, in an environment of its own."""

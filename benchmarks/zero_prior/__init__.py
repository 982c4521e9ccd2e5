"""The zero-prior token against other ways of naming a new object (`arms`), measured as each training goes."""

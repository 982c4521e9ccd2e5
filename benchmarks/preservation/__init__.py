"""How to hold a class while an object of it is taught: the ways (`ways`), and `preserve_prompts` for a style."""

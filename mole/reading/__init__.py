"""One place that checks a file before it is read, and one reader per format: text, JSON, YAML, tensors, tables.

Files come from anywhere. A reader returns what the file holds, or refuses it with a `CorruptFileError` that names the
file, what is wrong and what to do; it never hangs, never runs anything in the file, and never takes more memory than
there is.
"""

"""Readers of other people's routing records, one file a format; each writes a trace file.

Each module has one function `import_<format>(source, output, progress=None, *, options)` that returns an
`ImportReport`: what was written, and what of the source was left out or approximated.
"""

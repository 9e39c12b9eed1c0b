"""Checkpoints: layout and resharding (pure), manifest, language, formats, store, conversion, verification.

Everything here works on names, boxes and byte ranges; torch is imported in `formats` alone.
"""

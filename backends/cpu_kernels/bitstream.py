"""Codes to and from little-endian bitstreams: the core's, which the file readers share."""

from quantcore.bitstream import pack, unpack

__all__ = ["pack", "unpack"]

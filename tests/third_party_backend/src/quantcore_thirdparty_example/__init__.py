"""A third party's array library and its quantcore backends, one that works and two that are broken on purpose."""

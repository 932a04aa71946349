"""A plugin that is broken on purpose: its module can't be imported."""

raise RuntimeError("this plugin is broken on purpose")

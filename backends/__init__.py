"""The backends that come with quantcore: plugins like a third party's, importing the public ``quantcore`` only."""

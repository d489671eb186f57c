"""Which cached tokens attention reads in long contexts: one file per method, all behind
`selector.Selector`."""

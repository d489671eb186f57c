"""Between ranks: process groups, votes, the control channel, and the seams."""

"""Studies: many runs described by one file of `conf/study`, and the tables, verdicts and pictures made of them."""

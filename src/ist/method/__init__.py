"""Pure: sampling (eq. 6 and 7), importance (eq. 9 and 10), selectors; the spread and the ranks of `ist.focus`."""

"""Many models of one kind, trained on one data set."""

from fusemlp.fleet.fleet import Fleet as Fleet

"""One file per revision, in the order that `down_revision` tells."""

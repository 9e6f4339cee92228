//! A stream that splits, delays and cuts.

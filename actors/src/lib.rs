//! Who owns what, and the messages between them.
#![deny(unsafe_code)]

pub mod weights;

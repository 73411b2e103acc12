//! Who talks to whom: the actors' names and their messages.

use std::fmt;

/// An actor's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ActorId {
    /// The token loop.
    Pipeline,
    /// The device's part of a layer.
    DeviceLayer {
        /// Counted from 0.
        layer: usize,
    },
    /// A node's part of a layer.
    ColdLayer {
        /// Counted from 0.
        layer: usize,
        /// Counted from 0.
        node: usize,
    },
}

impl fmt::Display for ActorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ActorId::Pipeline => f.write_str("Pipeline"),
            ActorId::DeviceLayer { layer } => write!(f, "DeviceLayer {layer}"),
            ActorId::ColdLayer { layer, node } => write!(f, "ColdLayer {layer} on node {node}"),
        }
    }
}

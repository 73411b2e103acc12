//! Arrows from where a message is posted to where it is handled.

use std::collections::HashMap;

use pi_actors::trace::{Event, Label, NodeEvents};

/// Numbers of all messages that were both posted and handled. The n-th message of a label that is
/// posted is the n-th that is handled: all of them take one way, first in, first out.
#[derive(Debug, Default)]
pub(super) struct Flows(HashMap<Label, Flow>);

#[derive(Debug, Default)]
struct Flow {
    index: u64,
    posted: u64,
    handled: u64,
    /// Ends that have got their number.
    started: u64,
    ended: u64,
}

/// Messages of one label that can be told apart.
const MESSAGES_MAX: u64 = 1 << 16;

impl Flows {
    /// Of an engine's events; `engine` tells its numbers from those of others.
    pub fn of(nodes: &[NodeEvents], engine: usize) -> Self {
        let mut flows: HashMap<Label, Flow> = HashMap::new();
        for event in nodes.iter().flat_map(|node| &node.events) {
            let (Event::Posted { label, .. } | Event::Handled { label, .. }) = event else {
                continue;
            };
            let next = (engine as u64) << 40 | flows.len() as u64;
            let flow = flows.entry(*label).or_insert_with(|| Flow {
                index: next + 1,
                ..Flow::default()
            });
            match event {
                Event::Posted { .. } => flow.posted += 1,
                _ => flow.handled += 1,
            }
        }
        Self(flows)
    }

    /// The number of the next message of this label that was posted; none if it never was handled.
    pub fn start(&mut self, label: Label) -> Option<u64> {
        let flow = self.0.get_mut(&label)?;
        flow.started += 1;
        flow.number(flow.started - 1)
    }

    /// The number of the next message of this label that was handled; none if nobody posted it.
    pub fn end(&mut self, label: Label) -> Option<u64> {
        let flow = self.0.get_mut(&label)?;
        flow.ended += 1;
        flow.number(flow.ended - 1)
    }
}

impl Flow {
    fn number(&self, n: u64) -> Option<u64> {
        let pairs = self.posted.min(self.handled).min(MESSAGES_MAX);
        (n < pairs).then_some(self.index * MESSAGES_MAX + n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pi_actors::trace::MessageKind;

    #[test]
    fn only_messages_with_both_ends_have_numbers() {
        let label = |layer| Label {
            step: 1,
            kind: MessageKind::RunLayer,
            layer,
            node: 0,
        };
        let posted = |layer| Event::Posted {
            label: label(layer),
            at_t: 1,
            neurons: 0,
            active_neurons: 0,
        };
        let handled = |layer| Event::Handled {
            label: label(layer),
            start_t: 2,
            end_t: 3,
            waiting: 0,
            failed: false,
        };
        let events = vec![posted(0), posted(0), handled(0), posted(1), handled(2)];
        let mut flows = Flows::of(&[NodeEvents { events, lost: 0 }], 0);
        let number = flows.start(label(0));
        assert!(number.is_some());
        assert_eq!(flows.start(label(0)), None);
        assert_eq!(flows.end(label(0)), number);
        assert_eq!((flows.start(label(1)), flows.end(label(2))), (None, None));
    }
}

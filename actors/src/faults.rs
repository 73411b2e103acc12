//! Panics on request, so that tests can see that actors heal.

/// Panics to inject. Empty but in tests.
#[derive(Debug, Clone, Default)]
pub struct Faults;

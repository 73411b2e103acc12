//! Names from a file (keys, tensors): checked, and looked up through a sorted index.

use super::GgufError;
use super::cursor::Place;

/// The name as text, if it is nonempty UTF-8 of at most `bytes_max` bytes.
pub(super) fn checked<'a>(
    bytes: &'a [u8],
    bytes_max: usize,
    place: Place<'_>,
) -> Result<&'a str, GgufError> {
    let bad = |problem| GgufError::BadName {
        place: place.to_string(),
        problem,
    };
    if bytes.is_empty() {
        return Err(bad("the name is empty"));
    }
    if bytes.len() > bytes_max {
        return Err(bad("the name is longer than the format allows"));
    }
    std::str::from_utf8(bytes).map_err(|_| bad("the name is not valid UTF-8"))
}

/// Indices of `items` in the order of their names, or a name that occurs twice.
pub(super) fn sorted<T>(items: &[T], name: impl Fn(&T) -> &str) -> Result<Vec<u32>, &str> {
    let mut order: Vec<u32> = (0..items.len() as u32).collect();
    order.sort_unstable_by_key(|&index| name(&items[index as usize]));
    for pair in order.windows(2) {
        let later = name(&items[pair[1] as usize]);
        if name(&items[pair[0] as usize]) == later {
            return Err(later);
        }
    }
    Ok(order)
}

/// The item called `wanted`, through the index that [`sorted`] made.
pub(super) fn find<'a, T>(
    items: &'a [T],
    order: &[u32],
    name: impl Fn(&T) -> &str,
    wanted: &str,
) -> Option<&'a T> {
    let at = order
        .binary_search_by(|&index| name(&items[index as usize]).cmp(wanted))
        .ok()?;
    items.get(order[at] as usize)
}

//! Decompression of the embedded images.

/// The bytes of `packed`: their number (32 bits, little-endian), then one LZ4 block. `None` where it is damaged.
///
/// Source: `lz4_Block_format.md`.
pub(super) fn decompress(packed: &[u8]) -> Option<Vec<u8>> {
    let (len, mut rest) = packed.split_first_chunk::<4>()?;
    let len = u32::from_le_bytes(*len) as usize;
    let mut out = Vec::with_capacity(len);
    loop {
        let token = take(&mut rest, 1)?[0];
        let n_literals = long(usize::from(token >> 4), &mut rest)?;
        out.extend_from_slice(take(&mut rest, n_literals)?);
        if rest.is_empty() {
            return (out.len() == len).then_some(out);
        }
        let distance = take(&mut rest, 2)?;
        let distance = usize::from(u16::from_le_bytes([distance[0], distance[1]]));
        let n = 4 + long(usize::from(token & 15), &mut rest)?;
        let start = out.len().checked_sub(distance).filter(|_| distance > 0)?;
        if out.len() + n > len {
            return None;
        }
        // a match may overlap what it writes
        for at in start..start + n {
            out.push(out[at]);
        }
    }
}

fn take<'a>(rest: &mut &'a [u8], n: usize) -> Option<&'a [u8]> {
    let (taken, behind) = rest.split_at_checked(n)?;
    *rest = behind;
    Some(taken)
}

/// A count that goes on in further bytes where it is 15.
fn long(count: usize, rest: &mut &[u8]) -> Option<usize> {
    let mut count = count;
    if count == 15 {
        loop {
            let more = take(rest, 1)?[0];
            count += usize::from(more);
            if more != 255 {
                break;
            }
        }
    }
    Some(count)
}

#[cfg(test)]
mod tests {
    use super::decompress;

    #[test]
    fn literals_and_overlapping_matches_come_back() {
        // "ab", then 9 bytes from 2 back, then "z"
        let packed = [12, 0, 0, 0, 0x25, b'a', b'b', 2, 0, 0x10, b'z'];
        assert_eq!(decompress(&packed).unwrap(), b"abababababaz");
    }

    #[test]
    fn damage_is_found() {
        let packed = [12, 0, 0, 0, 0x25, b'a', b'b', 2, 0, 0x10, b'z'];
        for end in 0..packed.len() {
            assert_eq!(decompress(&packed[..end]), None, "{end} bytes");
        }
        let mut far = packed;
        far[7] = 3;
        assert_eq!(decompress(&far), None, "a match before the start");
        far[7] = 0;
        assert_eq!(decompress(&far), None, "a match of nothing");
    }
}

//! The compiled kernels, one image per architecture (`kernels/cuda/build` makes them).

use std::fmt;

/// Compute capability of a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Capability {
    /// Generation, such as 9 of 9.0.
    pub major: u32,
    /// Version within it.
    pub minor: u32,
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// Machine code for one architecture, compressed.
pub(super) struct Cubin {
    pub(super) capability: Capability,
    pub(super) packed: &'static [u8],
}

macro_rules! cubin {
    ($major:literal, $minor:literal) => {
        Cubin {
            capability: Capability {
                major: $major,
                minor: $minor,
            },
            packed: include_bytes!(concat!(
                "../../cuda/images/sm_",
                $major,
                $minor,
                ".cubin.lz4"
            )),
        }
    };
}

/// Ascending.
pub(super) static CUBINS: [Cubin; 6] = [
    cubin!(7, 5),
    cubin!(8, 0),
    cubin!(8, 6),
    cubin!(8, 9),
    cubin!(9, 0),
    cubin!(12, 0),
];

/// Text for GPUs newer than all of them, whose drivers are newer than the compiler and translate it.
pub(super) static PTX: &[u8] = include_bytes!("../../cuda/images/compute_120.ptx.lz4");

/// The image for a GPU: the newest cubin of its generation that is not newer than itself, else PTX where it is
/// newer than all cubins.
pub(super) fn choose(gpu: Capability) -> Option<&'static [u8]> {
    let fits =
        |cubin: &&Cubin| cubin.capability.major == gpu.major && cubin.capability.minor <= gpu.minor;
    let newest = CUBINS.last().expect("there are cubins").capability;
    match CUBINS.iter().rfind(fits) {
        Some(cubin) => Some(cubin.packed),
        None => (gpu > newest).then_some(PTX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::lz4::decompress;

    fn chosen(major: u32, minor: u32) -> Option<String> {
        let packed = choose(Capability { major, minor })?;
        let cubin = CUBINS
            .iter()
            .find(|cubin| std::ptr::eq(cubin.packed, packed));
        Some(cubin.map_or("PTX".to_owned(), |cubin| cubin.capability.to_string()))
    }

    #[test]
    fn a_gpu_gets_the_nearest_image_that_it_can_run() {
        let name = |name: &str| Some(name.to_owned());
        assert_eq!(chosen(7, 5), name("7.5"));
        assert_eq!(chosen(8, 0), name("8.0"));
        assert_eq!(chosen(8, 6), name("8.6"));
        assert_eq!(chosen(8, 7), name("8.6"));
        assert_eq!(chosen(8, 9), name("8.9"));
        assert_eq!(chosen(9, 0), name("9.0"));
        assert_eq!(chosen(12, 0), name("12.0"));
        assert_eq!(chosen(12, 1), name("12.0"));
        assert_eq!(chosen(13, 0), name("PTX"));
        for (major, minor) in [(6, 1), (7, 0), (7, 2), (10, 0), (11, 0)] {
            assert_eq!(chosen(major, minor), None, "{major}.{minor}");
        }
    }

    #[test]
    fn images_are_whole() {
        for cubin in &CUBINS {
            let image = decompress(cubin.packed).expect("an image");
            assert!(image.starts_with(b"\x7fELF"), "{}", cubin.capability);
        }
        let ptx = decompress(PTX).expect("text");
        assert_eq!(ptx.last(), Some(&0), "the driver wants a zero at the end");
        let text = String::from_utf8(ptx).expect("text");
        assert!(text.contains(".target sm_120"));
    }
}

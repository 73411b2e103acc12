//! What hwloc asks of libudev, answered with "there is no udev".
//!
//! hwloc asks udev for the makers' names of disks, which nobody here wants to know. Debian's static archive of hwloc
//! refers to libudev all the same, and with these five functions in the program it needs no such library, neither
//! where it is built nor where it runs. hwloc takes a null context for "no udev" and then calls none of the others.
//! Linked with a shared hwloc they do the same.

use std::ffi::{c_char, c_void};
use std::ptr;

// SAFETY: the name is that of libudev's function with this signature, and no libudev is linked; a library that is
// loaded later and links libudev itself finds that one, as a program's own functions are not exported to it.
#[unsafe(no_mangle)]
extern "C" fn udev_new() -> *mut c_void {
    ptr::null_mut()
}

// SAFETY: as udev_new; libudev returns null here too, whatever it is given.
#[unsafe(no_mangle)]
extern "C" fn udev_unref(_udev: *mut c_void) -> *mut c_void {
    ptr::null_mut()
}

// SAFETY: as udev_new; null is libudev's answer for a device that it does not know.
#[unsafe(no_mangle)]
extern "C" fn udev_device_new_from_subsystem_sysname(
    _udev: *mut c_void,
    _subsystem: *const c_char,
    _sysname: *const c_char,
) -> *mut c_void {
    ptr::null_mut()
}

// SAFETY: as udev_new; null is libudev's answer for a property that a device lacks.
#[unsafe(no_mangle)]
extern "C" fn udev_device_get_property_value(
    _device: *mut c_void,
    _key: *const c_char,
) -> *const c_char {
    ptr::null()
}

// SAFETY: as udev_new; libudev returns null here too, whatever it is given.
#[unsafe(no_mangle)]
extern "C" fn udev_device_unref(_device: *mut c_void) -> *mut c_void {
    ptr::null_mut()
}

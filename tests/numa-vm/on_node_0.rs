//! Runs a program whose own memory, what is bound to no node, comes from NUMA node 0 as long as it has some. (x86-64 Linux.)
use std::os::raw::{c_int, c_long, c_ulong};
use std::os::unix::process::CommandExt;

const SYS_SET_MEMPOLICY: c_long = 238;
const MPOL_PREFERRED: c_int = 1;

unsafe extern "C" {
    fn syscall(number: c_long, mode: c_int, nodes: *const c_ulong, n_bits: c_ulong) -> c_long;
}

fn main() {
    let node_0: c_ulong = 1;
    // SAFETY: the mask outlives the call.
    let failed = unsafe { syscall(SYS_SET_MEMPOLICY, MPOL_PREFERRED, &node_0, 64) };
    assert_eq!(failed, 0, "set_mempolicy: {}", std::io::Error::last_os_error());
    let mut args = std::env::args_os().skip(1);
    let program = args.next().expect("a program");
    // the policy stays over it
    let error = std::process::Command::new(program).args(args).exec();
    panic!("{error}");
}

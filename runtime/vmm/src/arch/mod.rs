//! What x86-64 and the Linux boot protocol fix: addresses, tables, the command line. Pure: it writes into
//! guest memory it is handed and computes values; it makes no system call and knows no KVM object.

pub mod boot;
pub mod cmdline;
pub mod layout;
pub mod mptable;

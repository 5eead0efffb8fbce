//! Which processes use the GPUs, and on which TCP ports they can be reached.
//!
//! An engine's server listens, and it or processes that it started (one a GPU) hold the GPU's memory. So the sockets of a
//! process and of those it descends from are its own here. The driver counts processes as the machine does; where the
//! agent lives in a namespace below that, they are sought by their number in any namespace that `NSpid` tells.
//!
//! Reading the descriptors of a busy server costs milliseconds. It is done when the set of processes changes, and again
//! after 1, 2, 4 … 32 seconds, since a server may listen long after it took the GPU.
//!
//! Not here: IPv6 addresses of network namespaces other than this process's own. Other users' sockets cannot be seen
//! without privilege; then no port is told.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use super::wire::Process;

/// Time to the second look at the same processes; doubles up to [`LOOK_MAX`].
const LOOK_FIRST: Duration = Duration::from_secs(1);
const LOOK_MAX: Duration = Duration::from_secs(32);
/// Generations that are followed upwards.
const ANCESTORS_MAX: usize = 32;
/// Descriptors of one process that are looked at.
const DESCRIPTORS_MAX: usize = 1 << 16;
/// Sockets that are told of one process.
const LISTENS_MAX: usize = 64;
/// Processes among which one is sought by its number in another namespace.
const PROCESSES_MAX: usize = 1 << 16;

/// What was found out about the processes on the GPUs.
pub(super) struct Processes {
    /// `/proc`, but in tests.
    proc: PathBuf,
    known: BTreeMap<u32, Found>,
    looked: Option<Instant>,
    wait: Duration,
}

#[derive(Default)]
struct Found {
    name: Option<String>,
    listens: Vec<String>,
}

impl Processes {
    pub(super) fn new(proc: impl Into<PathBuf>) -> Self {
        Self { proc: proc.into(), known: BTreeMap::new(), looked: None, wait: LOOK_FIRST }
    }

    /// Adds to `processes` what is known of them, after a look where one is due.
    pub(super) fn complete<'p>(&mut self, now: Instant, processes: impl Iterator<Item = &'p mut Process>) {
        let processes: Vec<_> = processes.collect();
        let pids: BTreeSet<u32> = processes.iter().map(|process| process.pid).collect();
        let changed = !pids.iter().eq(self.known.keys());
        if changed || self.looked.is_none_or(|at| now.duration_since(at) >= self.wait) {
            self.wait = if changed { LOOK_FIRST } else { (self.wait * 2).min(LOOK_MAX) };
            self.looked = Some(now);
            self.known = Look::new(&self.proc).at(&pids);
        }
        for process in processes {
            if let Some(found) = self.known.get(&process.pid) {
                process.name.clone_from(&found.name);
                process.listens.clone_from(&found.listens);
            }
        }
    }
}

/// Sockets that listen, by inode.
type Table = HashMap<u64, SocketAddr>;

/// One look at the machine; each network namespace's sockets are read once.
struct Look<'p> {
    proc: &'p Path,
    /// The network namespace of this process.
    own: Option<PathBuf>,
    tables: HashMap<PathBuf, (Table, Vec<IpAddr>)>,
}

impl<'p> Look<'p> {
    fn new(proc: &'p Path) -> Self {
        Self { proc, own: fs::read_link(proc.join("self/ns/net")).ok(), tables: HashMap::new() }
    }

    fn at(&mut self, pids: &BTreeSet<u32>) -> BTreeMap<u32, Found> {
        let here = self.translate(pids);
        pids.iter().map(|pid| (*pid, here.get(pid).map_or_else(Found::default, |here| self.find(*here)))).collect()
    }

    /// The driver's numbers as this process counts.
    fn translate(&self, pids: &BTreeSet<u32>) -> BTreeMap<u32, u32> {
        let exists = |pid: &u32| self.proc.join(pid.to_string()).is_dir();
        let mut here: BTreeMap<u32, u32> = pids.iter().filter(|pid| exists(pid)).map(|pid| (*pid, *pid)).collect();
        if here.len() == pids.len() {
            return here;
        }
        let entries = fs::read_dir(self.proc).into_iter().flatten().flatten().take(PROCESSES_MAX);
        for pid in entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()) {
            for inner in self.status(pid).map(|status| status.inner).unwrap_or_default() {
                if pids.contains(&inner) {
                    here.entry(inner).or_insert(pid);
                }
            }
        }
        here
    }

    fn find(&mut self, pid: u32) -> Found {
        let name = fs::read_to_string(self.proc.join(format!("{pid}/comm"))).ok();
        // Its own before those of whoever started it, who may have more than are told.
        let mut listens: Vec<SocketAddr> = Vec::new();
        let mut next = Some(pid);
        for _ in 0..ANCESTORS_MAX {
            let Some(pid) = next.filter(|pid| *pid > 0 && listens.len() < LISTENS_MAX) else { break };
            let mut more = self.sockets(pid);
            more.retain(|socket| !listens.contains(socket));
            listens.extend(more);
            next = self.status(pid).map(|status| status.parent);
        }
        let listens = listens.iter().take(LISTENS_MAX).map(ToString::to_string).collect();
        Found { name: name.map(|name| name.trim_end().to_owned()), listens }
    }

    fn status(&self, pid: u32) -> Option<Status> {
        Some(status(&fs::read_to_string(self.proc.join(format!("{pid}/status"))).ok()?))
    }

    /// The sockets on which one process listens.
    fn sockets(&mut self, pid: u32) -> BTreeSet<SocketAddr> {
        let mut listens = BTreeSet::new();
        let descriptors = fs::read_dir(self.proc.join(format!("{pid}/fd"))).into_iter().flatten().flatten();
        let inodes = descriptors.take(DESCRIPTORS_MAX).filter_map(|entry| {
            let link = fs::read_link(entry.path()).ok()?;
            link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse::<u64>().ok()
        });
        let inodes: Vec<u64> = inodes.collect();
        let Ok(space) = fs::read_link(self.proc.join(format!("{pid}/ns/net"))) else { return listens };
        let is_own = self.own.as_ref() == Some(&space);
        let (table, addresses) = self.tables.entry(space).or_insert_with(|| {
            let read = |name: &str| fs::read_to_string(self.proc.join(format!("{pid}/net/{name}"))).unwrap_or_default();
            let mut table = listening(&read("tcp"));
            table.extend(listening(&read("tcp6")));
            (table, if is_own { Vec::new() } else { local_addresses(&read("fib_trie")) })
        });
        for socket in inodes.iter().filter_map(|inode| table.get(inode)) {
            if is_own || !socket.ip().is_unspecified() {
                listens.insert(*socket);
            } else {
                listens.extend(addresses.iter().map(|address| SocketAddr::new(*address, socket.port())));
            }
        }
        listens
    }
}

/// Of `/proc/<pid>/status`.
#[derive(Debug, Default, PartialEq)]
struct Status {
    parent: u32,
    /// Its numbers in the namespaces below the one that was asked.
    inner: Vec<u32>,
}

fn status(text: &str) -> Status {
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
    let inner = field("NSpid:").split_whitespace().skip(1).filter_map(|pid| pid.parse().ok());
    Status { parent: field("PPid:").trim().parse().unwrap_or(0), inner: inner.collect() }
}

/// Of `/proc/<pid>/net/tcp` or `tcp6`.
fn listening(text: &str) -> Table {
    const LISTEN: &str = "0A";
    let sockets = text.lines().skip(1).filter_map(|line| {
        let mut fields = line.split_whitespace();
        let address = fields.nth(1)?;
        if fields.nth(1)? != LISTEN {
            return None;
        }
        Some((fields.nth(5)?.parse().ok()?, address_of(address)?))
    });
    sockets.collect()
}

/// As the kernel writes it: words of 32 bits in the machine's order, in hex; then the port.
fn address_of(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let mut bytes = Vec::with_capacity(16);
    for at in (0..address.len()).step_by(8) {
        let word = u32::from_str_radix(address.get(at..at + 8)?, 16).ok()?;
        bytes.extend(word.to_ne_bytes());
    }
    let ip: IpAddr = match bytes.len() {
        4 => Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into(),
        16 => Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).to_canonical(),
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

/// Of `/proc/<pid>/net/fib_trie`: the addresses of a network namespace, without loopback.
fn local_addresses(text: &str) -> Vec<IpAddr> {
    let mut leaf = None;
    let mut found = BTreeSet::new();
    for line in text.lines().map(str::trim_start) {
        if let Some(address) = line.strip_prefix("|-- ") {
            leaf = address.trim().parse::<Ipv4Addr>().ok();
        } else if line.starts_with("/32 host LOCAL") {
            found.extend(leaf.filter(|address| !address.is_loopback()));
        }
    }
    found.into_iter().map(IpAddr::V4).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_tells_the_parent_and_the_numbers_within() {
        let text = "Name:\tpython3\nPPid:\t77\nNSpid:\t4242\t17\t1\nThreads:\t9\n";
        assert_eq!(status(text), Status { parent: 77, inner: vec![17, 1] });
        assert_eq!(status("NSpid:\t5\n"), Status { parent: 0, inner: vec![] });
        assert_eq!(status("garbage"), Status::default());
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn sockets_that_listen_are_told_by_inode() {
        let head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";
        let rest = "00000000:00000000 00:00000000 00000000     0        0";
        let tcp = format!(
            "{head}   0: 0100007F:1F40 00000000:0000 0A {rest} 111 1 0 100 0 0 10 0\n   1: 0100007F:1F41 0100007F:1 01 {rest} 112 1\n   2: 00000000:1BA0 00000000:0000 0A {rest} 113 1\nshort\n"
        );
        let found = listening(&tcp);
        assert_eq!(found.len(), 2, "{found:?}");
        assert_eq!(found[&111].to_string(), "127.0.0.1:8000");
        assert_eq!(found[&113].to_string(), "0.0.0.0:7072");
        let zero = "00000000000000000000000000000000";
        let tcp6 = format!(
            "{head} 0: {zero}:1F40 {zero}:0000 0A {rest} 7 1\n 1: 0000000000000000FFFF00000100007F:1F41 {zero}:0000 0A {rest} 8 1\n"
        );
        let found = listening(&tcp6);
        assert_eq!((found[&7].to_string(), found[&8].to_string()), ("[::]:8000".into(), "127.0.0.1:8001".into()));
    }

    #[test]
    fn a_namespaces_addresses_come_from_its_routes() {
        let text = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 0.0.0.0\n        /0 universe UNICAST\n     +-- 10.42.0.0/24 2 0 2\n        |-- 10.42.0.0\n           /24 link UNICAST\n        |-- 10.42.0.7\n           /32 host LOCAL\n        |-- 127.0.0.1\n           /32 host LOCAL\n";
        assert_eq!(local_addresses(text), ["10.42.0.7".parse::<IpAddr>().unwrap()]);
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn one_in_a_container_is_found_by_its_number_there_and_told_by_the_containers_address() {
        use std::os::unix::fs::symlink;
        let proc = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = proc.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let link = |path: &str, to: &str| {
            let path = proc.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            symlink(to, path).unwrap();
        };
        link("self/ns/net", "net:[1]");
        // the server, below it the process that holds the GPU, and above it one that listens on more than are told
        for number in 0..=LISTENS_MAX {
            link(&format!("60/fd/{number}"), &format!("socket:[{}]", 100 + number));
        }
        link("60/ns/net", "net:[1]");
        let row =
            |number| format!(" 0: 0100007F:{:04X} 00000000:0000 0A 0:0 0:0 0 0 0 {} 1\n", 1000 + number, 100 + number);
        write("60/net/tcp", &("head\n".to_owned() + &(0..=LISTENS_MAX).map(row).collect::<String>()));
        for (pid, parent, inner, socket) in [(70, 60, 1, "socket:[9]"), (71, 70, 12, "/dev/nvidia0")] {
            write(&format!("{pid}/status"), &format!("PPid:\t{parent}\nNSpid:\t{pid}\t{inner}\n"));
            write(&format!("{pid}/comm"), "engine\n");
            link(&format!("{pid}/fd/3"), socket);
            link(&format!("{pid}/ns/net"), "net:[2]");
            let tcp = "head\n 0: 00000000:1F40 00000000:0000 0A 0:0 0:0 0 0 0 9 1\n";
            write(&format!("{pid}/net/tcp"), tcp);
            write(&format!("{pid}/net/fib_trie"), "|-- 10.42.0.7\n /32 host LOCAL\n");
        }
        let mut process = [Process { pid: 12, ..Process::default() }];
        Processes::new(proc.path()).complete(Instant::now(), process.iter_mut());
        let listens = &process[0].listens;
        assert_eq!((process[0].name(), listens[0].as_str(), listens.len()), ("engine", "10.42.0.7:8000", LISTENS_MAX));
    }

    #[test]
    fn this_process_is_found_with_its_socket_and_looked_at_at_growing_intervals() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let own = listener.local_addr().unwrap().to_string();
        let mut processes = Processes::new("/proc");
        let mut look = |now| {
            let mut all = [std::process::id(), u32::MAX].map(|pid| Process { pid, ..Process::default() });
            processes.complete(now, all.iter_mut());
            all.map(|process| (process.name.is_some(), process.listens.contains(&own)))
        };
        let began = Instant::now();
        assert_eq!(look(began), [(true, true), (false, false)]);
        drop(listener);
        assert!(look(began + LOOK_FIRST / 2)[0].1, "no look is due yet");
        assert!(!look(began + LOOK_FIRST)[0].1);
    }
}

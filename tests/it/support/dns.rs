//! A name server (RFC 1035, over UDP) that answers A and SRV (RFC 2782) from a table that a test changes.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex};

/// What a name has; an absent name is unknown (NXDOMAIN).
#[derive(Clone)]
pub(crate) enum Records {
    Addresses(Vec<Ipv4Addr>),
    /// Priority, port and target.
    Services(Vec<(u16, u16, &'static str)>),
    /// The server fails.
    Broken,
}

pub(crate) struct NameServer {
    pub(crate) address: SocketAddr,
    table: Arc<Mutex<HashMap<&'static str, Records>>>,
}

impl NameServer {
    pub(crate) fn start() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a port");
        let (address, table) = (socket.local_addr().expect("bound"), Arc::default());
        let server = Self { address, table };
        let table = Arc::clone(&server.table);
        std::thread::spawn(move || {
            let mut question = [0; 512];
            while let Ok((length, from)) = socket.recv_from(&mut question) {
                let answer = answer(&question[..length], &table.lock().expect("no panic"));
                let _ = socket.send_to(&answer, from);
            }
        });
        server
    }

    pub(crate) fn set(&self, name: &'static str, records: Records) {
        self.table.lock().expect("no panic").insert(name, records);
    }
}

fn answer(question: &[u8], table: &HashMap<&'static str, Records>) -> Vec<u8> {
    let (mut name, mut at) = (String::new(), 12);
    while question[at] != 0 {
        let end = at + 1 + usize::from(question[at]);
        name.push_str(std::str::from_utf8(&question[at + 1..end]).expect("ASCII"));
        name.push('.');
        at = end;
    }
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    let kind = u16::from_be_bytes([question[at + 1], question[at + 2]]);
    let (mut records, mut code) = (Vec::new(), 0);
    match table.get(&*name) {
        None => code = 3,
        Some(Records::Broken) => code = 2,
        Some(Records::Addresses(addresses)) if kind == 1 => {
            records.extend(addresses.iter().map(|a| a.octets().to_vec()));
        }
        Some(Records::Services(services)) if kind == 33 => {
            records.extend(services.iter().map(|(priority, port, target)| {
                let mut data: Vec<u8> = [*priority, 0, *port].iter().flat_map(|number| number.to_be_bytes()).collect();
                for label in target.split('.') {
                    data.push(u8::try_from(label.len()).expect("short"));
                    data.extend_from_slice(label.as_bytes());
                }
                data.push(0);
                data
            }));
        }
        Some(_) => {}
    }
    let mut out = question[..2].to_vec();
    out.extend([0x81, 0x80 | code, 0, 1]);
    out.extend(u16::try_from(records.len()).expect("few").to_be_bytes());
    out.extend([0; 4]);
    out.extend(&question[12..at + 5]);
    for data in records {
        out.extend([0xc0, 12]);
        out.extend(kind.to_be_bytes());
        out.extend([0, 1, 0, 0, 0, 60]);
        out.extend(u16::try_from(data.len()).expect("short").to_be_bytes());
        out.extend(data);
    }
    out
}

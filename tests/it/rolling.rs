//! A rolling restart: two gateways behind a balancer that knows nothing of them, one stopped and started after the
//! other under load. Nobody notices.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use super::support::body::{ANSWER, FINISH, chat, delta, streamed};
use super::support::client::{Answer, Connection};
use super::support::eventually;
use super::support::process::{Gateway, model, tokenizer};
use super::support::recorder::{Recorder, json, stream};

const CHAT: &str = "/v1/chat/completions";
/// Clients of each kind.
const CLIENTS: usize = 4;

/// Takes its upstreams in turn, and the next one where one does not let it in. Bytes pass unread.
fn balancer(upstreams: [SocketAddr; 2]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        for (turn, client) in listener.incoming().map_while(Result::ok).enumerate() {
            std::thread::spawn(move || {
                let mut tries = (turn..turn + 20).map(|at| upstreams[at % 2]);
                let connect = |address| TcpStream::connect_timeout(&address, Duration::from_millis(500)).ok();
                let upstream = tries.find_map(connect).expect("one of the two listens");
                for socket in [&client, &upstream] {
                    socket.set_nodelay(true).expect("a socket");
                }
                let back = (upstream.try_clone().expect("a socket"), client.try_clone().expect("a socket"));
                std::thread::spawn(move || pass(back.0, back.1));
                pass(client, upstream);
            });
        }
    });
    address
}

fn pass(mut from: TcpStream, mut to: TcpStream) {
    let mut piece = [0; 16384];
    loop {
        match from.read(&mut piece) {
            Ok(length) if length > 0 => {
                if to.write_all(&piece[..length]).is_err() {
                    break;
                }
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            _ => break,
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

/// How a client treats its connections.
#[derive(Debug, Clone, Copy)]
enum Habit {
    /// A new one for each request.
    Fresh,
    /// The same one until an answer says that it is the last.
    KeepAlive,
}

fn client(address: SocketAddr, habit: Habit, number: usize, answered: &AtomicUsize, enough: &AtomicBool) {
    let mut open: Option<Connection> = None;
    for count in 0.. {
        if enough.load(Ordering::Relaxed) {
            return;
        }
        let mut connection = open.take().unwrap_or_else(|| Connection::to(address));
        let text = format!("{habit:?} {number} {count}");
        let is_stream = count % 2 == 1;
        let body = if is_stream { streamed(&text) } else { chat(&text, "") };
        connection.post(CHAT, &[], body.as_bytes());
        let answer = connection.answer();
        assert!(answer.status == 200 && answer.whole, "{text}: {answer:?}");
        if is_stream {
            assert_eq!(answer.stream_end(), Ok(()), "{text}");
        }
        answered.fetch_add(1, Ordering::Relaxed);
        let is_last = |answer: &Answer| answer.header("connection") == Some("close");
        open = (matches!(habit, Habit::KeepAlive) && !is_last(&answer)).then_some(connection);
    }
}

#[test]
fn nobody_notices_a_rolling_restart() {
    let recorder = Recorder::start("m", vec![json("200 OK", ANSWER)]);
    // A document to who asks for a stream is refused by nobody; but here each gets what it asked for.
    recorder.answer_streams(stream(&[&delta("one"), &delta("two"), FINISH]));
    let models = model("m", &[recorder.address], &format!("tokenizer = {:?}\n", tokenizer()));
    let start =
        |address: SocketAddr| Gateway::start_unready("", &models, &[("FOREBAY__SERVER__LISTEN", &address.to_string())]);
    let free = SocketAddr::from(([127, 0, 0, 1], 0));
    let mut gateways = [start(free), start(free)];
    gateways.iter().for_each(Gateway::until_ready);
    let balancer = balancer([gateways[0].client, gateways[1].client]);
    let (answered, enough) = (AtomicUsize::new(0), AtomicBool::new(false));
    std::thread::scope(|threads| {
        let clients: Vec<_> = [Habit::Fresh, Habit::KeepAlive]
            .into_iter()
            .flat_map(|habit| (0..CLIENTS).map(move |number| (habit, number)))
            .map(|(habit, number)| {
                let (answered, enough) = (&answered, &enough);
                threads.spawn(move || client(balancer, habit, number, answered, enough))
            })
            .collect();
        let more = |count: usize| {
            let target = answered.load(Ordering::Relaxed) + count;
            eventually("more answers", || {
                let failed = clients.iter().any(std::thread::ScopedJoinHandle::is_finished);
                (failed || answered.load(Ordering::Relaxed) >= target).then_some(())
            });
        };
        for round in 0..4 {
            more(200);
            let gateway = &mut gateways[round % 2];
            let address = gateway.client;
            gateway.process.signal("TERM");
            assert_eq!(gateway.process.wait().code(), Some(0));
            let rows = gateway.rows();
            assert!(rows.iter().all(|row| row["outcome"] == "completed"), "round {round}");
            *gateway = start(address);
        }
        more(200);
        enough.store(true, Ordering::Relaxed);
        for client in clients {
            client.join().expect("every request of this client is answered");
        }
    });
    println!("{} requests, four restarts", answered.load(Ordering::Relaxed));
}

//! What works: reuse, bounds, concurrency, prompt closing.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use bytes::Bytes;
use forebay_backends::{
    Error,
    transport::{Body, Endpoint, Outgoing, Timeouts, Transport},
};
use futures::future::join_all;
use http::{HeaderMap, HeaderName, HeaderValue};
use proptest::prelude::*;
use tokio::{io::AsyncReadExt, net::TcpListener, sync::oneshot, time::timeout};
use tokio_util::task::TaskTracker;

use crate::support::{PATIENCE, Server, millis, post, until};

/// Answers every request with its own body.
async fn echo() -> Server {
    Server::start(|mut served| async move {
        while let Some(request) = served.request().await {
            served.answer(200, &String::from_utf8_lossy(&request.body)).await;
        }
    })
    .await
}

async fn read(mut body: Body) -> Result<Vec<u8>, Error> {
    let mut all = Vec::new();
    while let Some(piece) = body.next().await {
        all.extend_from_slice(&piece?);
    }
    Ok(all)
}

#[tokio::test]
async fn one_connection_serves_one_request_after_the_other() {
    let server = echo().await;
    let channel = server.channel(Timeouts::default());
    for number in 0..50 {
        let answer = channel.send(post(format!("{number}"))).await.expect("an answer");
        assert_eq!(answer.status, 200);
        assert_eq!(read(answer.body).await.expect("a body"), format!("{number}").as_bytes());
    }
    assert_eq!(server.seen.connections(), 1);
    assert_eq!(channel.idle_connections(), 1);
}

#[tokio::test]
async fn what_is_written_is_what_was_asked() {
    let server = echo().await;
    let url = format!("http://{}/pool/v1", server.address).parse().expect("a URL");
    let endpoint = Endpoint::new(&url, Some(&"worker-key".into())).expect("an endpoint");
    let channel = Transport::new(TaskTracker::new()).channel(endpoint, Timeouts::default());
    let mut request = post(r#"{"model":"m"}"#);
    for (name, value) in [("authorization", "Bearer client-key"), ("x-request-id", "r-1"), ("connection", "close")] {
        request.headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
    }
    channel.send(request).await.expect("an answer");

    let seen = server.seen.requests.lock();
    let request = seen.first().expect("a request");
    assert!(request.head.starts_with("POST /pool/v1/chat/completions HTTP/1.1\r\n"), "{}", request.head);
    let address = server.address.to_string();
    for (name, value) in [
        ("host", Some(address.as_str())),
        ("authorization", Some("Bearer worker-key")),
        ("content-type", Some("application/json")),
        ("content-length", Some("13")),
        ("x-request-id", Some("r-1")),
        ("connection", None),
        ("transfer-encoding", None),
    ] {
        assert_eq!(request.header(name), value, "{name}");
    }
    assert_eq!(request.body, br#"{"model":"m"}"#);
}

#[tokio::test]
async fn a_content_type_of_the_client_is_kept() {
    let server = echo().await;
    let mut request = post("x");
    request.headers = HeaderMap::from_iter([(http::header::CONTENT_TYPE, HeaderValue::from_static("text/plain"))]);
    server.channel(Timeouts::default()).send(request).await.expect("an answer");
    assert_eq!(server.seen.requests.lock()[0].header("content-type"), Some("text/plain"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_at_once_and_their_connections_again() {
    let server = echo().await;
    let channel = server.channel(Timeouts { keep_alive: PATIENCE, ..Timeouts::default() });
    for round in 0..3 {
        // All heads first, so that each holds a connection of its own.
        let answers = join_all((0..100).map(|number| channel.send(post(format!("{round}-{number}"))))).await;
        for (number, answer) in answers.into_iter().enumerate() {
            let body = read(answer.expect("an answer").body).await.expect("a body");
            assert_eq!(body, format!("{round}-{number}").as_bytes());
        }
        until("all are idle again", || channel.idle_connections() == 100).await;
        assert_eq!(server.seen.connections(), 100, "round {round}");
    }
}

#[tokio::test]
async fn idle_connections_are_bounded() {
    let server = echo().await;
    let channel = server.channel(Timeouts { keep_alive: PATIENCE, ..Timeouts::default() });
    let answers = join_all((0..300).map(|_| channel.send(post("x")))).await;
    assert_eq!(server.seen.connections(), 300);
    for answer in answers {
        read(answer.expect("an answer").body).await.expect("a body");
    }
    assert_eq!(channel.idle_connections(), 256);
}

#[tokio::test]
async fn an_idle_connection_ages_out() {
    let server = echo().await;
    let channel = server.channel(Timeouts { keep_alive: millis(30), ..Timeouts::default() });
    for expected in 1..=3 {
        read(channel.send(post("x")).await.expect("an answer").body).await.expect("a body");
        assert_eq!(server.seen.connections(), expected);
        tokio::time::sleep(millis(31)).await;
    }
}

/// A name may lead elsewhere by then.
#[tokio::test]
async fn no_connection_is_used_for_ever() {
    let server = echo().await;
    let channel = server.channel(Timeouts { lifetime: millis(30), keep_alive: PATIENCE, ..Timeouts::default() });
    let busy = async {
        while server.seen.connections() < 3 {
            read(channel.send(post("x")).await.expect("an answer").body).await.expect("a body");
        }
    };
    timeout(PATIENCE, busy).await.expect("a new connection now and then");
}

#[tokio::test]
async fn a_connection_the_worker_wants_closed_is_not_kept() {
    for head in ["HTTP/1.1 200 OK\r\nconnection: close", "HTTP/1.0 200 OK"] {
        let server = Server::start(move |mut served| async move {
            while served.request().await.is_some() {
                served.send(format!("{head}\r\ncontent-length: 2\r\n\r\nok")).await;
            }
        })
        .await;
        let channel = server.channel(Timeouts::default());
        for expected in 1..=3 {
            let answer = channel.send(post("x")).await.expect("an answer");
            assert_eq!(read(answer.body).await.expect("a body"), b"ok");
            assert_eq!(server.seen.connections(), expected, "{head}");
        }
    }
}

#[tokio::test]
async fn interim_answers_are_passed_over() {
    const INTERIM: &str = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n";
    const ANSWER: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
    let server = Server::start(|mut served| async move {
        served.request().await;
        served.send(format!("{INTERIM}{ANSWER}")).await;
        served.request().await;
        served.send(INTERIM).await;
        for byte in ANSWER.bytes() {
            served.send([byte]).await;
            tokio::task::yield_now().await;
        }
        served.closed().await;
    })
    .await;
    let channel = server.channel(Timeouts::default());
    for _ in 0..2 {
        let answer = channel.send(post("x")).await.expect("an answer");
        assert_eq!((answer.status.as_u16(), answer.headers.len()), (200, 1));
        assert_eq!(read(answer.body).await.expect("a body"), b"ok");
    }
    assert_eq!(server.seen.connections(), 1);
}

#[tokio::test]
async fn interim_answers_have_a_bound() {
    let server = Server::start(|mut served| async move {
        served.request().await;
        served.send("HTTP/1.1 100\r\n\r\n".repeat(6000)).await;
        served.send("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
        served.closed().await;
    })
    .await;
    let sent = server.channel(Timeouts::default()).send(post("x")).await;
    assert!(matches!(sent, Err(Error::Malformed { .. })));
}

/// Line ends without a carriage return end a head as well, whatever the body has.
#[tokio::test]
async fn bare_line_ends() {
    for head in [
        "HTTP/1.1 200 OK\ntransfer-encoding: chunked\n\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\n",
        "HTTP/1.1 200 OK\ntransfer-encoding: chunked\n\r\n",
        "\r\n\r\nHTTP/1.1 200 OK\r\nx: \r\ntransfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n",
    ] {
        let server = Server::start(move |mut served| async move {
            served.request().await;
            served.send(format!("{head}8\r\na\r\n\r\nb\r\n\r\n0\r\n\r\n")).await;
            served.closed().await;
        })
        .await;
        let answer = server.channel(Timeouts::default()).send(post("x")).await.expect("an answer");
        assert_eq!(answer.headers.get("content-length"), None, "{head:?}");
        assert_eq!(read(answer.body).await.expect("a body"), b"a\r\n\r\nb\r\n", "{head:?}");
    }
}

/// Also what comes behind an answer when it is already read, so that it cannot be taken for the next one.
#[tokio::test]
async fn what_comes_unasked_is_nobodys_answer() {
    let (say, said) = (Arc::new(tokio::sync::Notify::new()), Arc::new(AtomicUsize::new(0)));
    let (heard, saying) = (Arc::clone(&say), Arc::clone(&said));
    let server = Server::start(move |mut served| {
        let (heard, saying) = (Arc::clone(&heard), Arc::clone(&saying));
        async move {
            while served.request().await.is_some() {
                served.answer(200, "ok").await;
                heard.notified().await;
                served.answer(200, "bad").await;
                saying.fetch_add(1, Ordering::SeqCst);
            }
        }
    })
    .await;
    let channel = server.channel(Timeouts::default());
    for round in 1..=3 {
        let answer = channel.send(post("x")).await.expect("an answer");
        assert_eq!(read(answer.body).await.expect("a body"), b"ok", "round {round}");
        say.notify_one();
        until("it was said", || said.load(Ordering::SeqCst) == round).await;
    }
}

#[tokio::test]
async fn a_connection_that_says_more_than_it_was_asked_is_not_kept() {
    for more in ["HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nbad", "x"] {
        let server = Server::start(move |mut served| async move {
            while served.request().await.is_some() {
                served.send(format!("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok{more}")).await;
            }
        })
        .await;
        let channel = server.channel(Timeouts::default());
        for expected in 1..=2 {
            let answer = channel.send(post("x")).await.expect("an answer");
            assert_eq!(read(answer.body).await.expect("a body"), b"ok");
            assert_eq!(server.seen.connections(), expected);
        }
    }
}

/// A long prompt is not kept for as long as its answer takes.
#[tokio::test]
async fn a_request_that_is_written_is_let_go() {
    struct Kept(Arc<Vec<u8>>);
    impl AsRef<[u8]> for Kept {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }
    let server = Server::start(|mut served| async move {
        served.request().await;
        served.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n").await;
        served.closed().await;
    })
    .await;
    let kept = Arc::new(b"a prompt".to_vec());
    let request = Outgoing { body: Bytes::from_owner(Kept(Arc::clone(&kept))), ..post("") };
    let mut answer = server.channel(Timeouts::default()).send(request).await.expect("an answer");
    assert_eq!(answer.body.next().await.expect("a piece").expect("a piece"), "ok");
    assert_eq!(Arc::strong_count(&kept), 1);
}

#[tokio::test]
async fn an_answer_may_begin_before_the_request_is_read() {
    let server = Server::start(|mut served| async move {
        served.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nyes\r\n").await;
        let length = served.request().await.map_or(0, |request| request.body.len());
        served.send(format!("8\r\n{length:8}\r\n0\r\n\r\n")).await;
        served.closed().await;
    })
    .await;
    let channel = server.channel(Timeouts::default());
    let answer = channel.send(post("x".repeat(16 << 20))).await.expect("an answer");
    assert_eq!(read(answer.body).await.expect("a body"), b"yes16777216");
    assert_eq!(channel.idle_connections(), 1);
}

#[tokio::test]
async fn a_body_read_to_its_last_byte_gives_the_connection_back() {
    let server = echo().await;
    let channel = server.channel(Timeouts::default());
    let mut body = channel.send(post("x")).await.expect("an answer").body;
    assert_eq!(body.next().await.expect("a piece").expect("bytes"), "x");
    drop(body);
    assert_eq!(channel.idle_connections(), 1);
}

#[tokio::test]
async fn large_bodies_arrive_whole() {
    let server = echo().await;
    let body: String = (0..1_000_000).map(|number| char::from(b'a' + (number % 26) as u8)).collect();
    let answer = server.channel(Timeouts::default()).send(post(body.clone())).await.expect("an answer");
    assert!(read(answer.body).await.expect("a body") == body.as_bytes());
}

#[tokio::test]
async fn ipv6() {
    let Ok(listener) = TcpListener::bind("[::1]:0").await else {
        println!("skipped: IPv6 loopback not found");
        return;
    };
    let server = Server::on(listener, |mut served| async move {
        while served.request().await.is_some() {
            served.answer(200, "six").await;
        }
    });
    let answer = server.channel(Timeouts::default()).send(post("x")).await.expect("an answer");
    assert_eq!(read(answer.body).await.expect("a body"), b"six");
    assert_eq!(server.seen.requests.lock()[0].header("host"), Some(server.address.to_string().as_str()));
}

#[tokio::test]
async fn closing_ends_what_waits_at_once_and_the_rest_with_its_answer() {
    let ended = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&ended);
    let server = Server::start(move |mut served| {
        let counted = Arc::clone(&counted);
        async move {
            while let Some(request) = served.request().await {
                served.answer(200, &String::from_utf8_lossy(&request.body)).await;
            }
            counted.fetch_add(1, Ordering::SeqCst);
        }
    })
    .await;
    let transport = Transport::new(TaskTracker::new());
    let endpoint = Endpoint::new(&format!("http://{}", server.address).parse().expect("a URL"), None);
    let channel = transport.channel(endpoint.expect("an endpoint"), Timeouts::default());
    let first = channel.send(post("x")).await.expect("an answer");
    let under_way = channel.send(post("y")).await.expect("an answer");
    read(first.body).await.expect("a body");
    assert_eq!(channel.idle_connections(), 1);

    transport.close();
    until("the idle one is closed", || ended.load(Ordering::SeqCst) == 1).await;
    assert_eq!(channel.idle_connections(), 0);
    assert_eq!(read(under_way.body).await.expect("what is under way is not disturbed"), b"y");
    until("none is kept", || ended.load(Ordering::SeqCst) == 2).await;
}

/// How soon the server sees the connection closed after `leave` was called.
async fn closed_after(sent: &'static str, leave: impl AsyncFnOnce(Leaving)) -> std::time::Duration {
    let (asked, was_asked) = oneshot::channel();
    let (saw, was_seen) = oneshot::channel();
    let ends = parking_lot::Mutex::new(Some((asked, saw)));
    let server = Server::start(move |mut served| {
        let ends = ends.lock().take();
        async move {
            let (asked, saw) = ends.expect("one connection");
            served.request().await;
            served.send(sent).await;
            asked.send(()).expect("a waiting test");
            served.closed().await;
            saw.send(Instant::now()).expect("a waiting test");
        }
    })
    .await;
    let (left, has_left) = oneshot::channel();
    leave(Leaving { channel: server.channel(Timeouts::default()), was_asked, left }).await;
    let left = has_left.await.expect("the test says when it left");
    timeout(PATIENCE, was_seen).await.expect("the server sees it").expect("the server lives") - left
}

struct Leaving {
    channel: forebay_backends::transport::Channel,
    was_asked: oneshot::Receiver<()>,
    left: oneshot::Sender<Instant>,
}

const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
const HEAD_AND_CHUNK: &str = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n";

#[tokio::test]
async fn leaving_before_the_head_closes_at_once() {
    let took = closed_after("", async |leaving: Leaving| {
        let mut sending = Box::pin(leaving.channel.send(post("x")));
        tokio::select! {
            _ = &mut sending => panic!("the server says nothing"),
            asked = leaving.was_asked => asked.expect("the server lives"),
        }
        leaving.left.send(Instant::now()).expect("a waiting test");
        drop(sending);
    })
    .await;
    assert!(took < millis(100), "{took:?}");
}

#[tokio::test]
async fn leaving_while_the_body_is_silent_closes_at_once() {
    for sent in [HEAD, HEAD_AND_CHUNK] {
        let took = closed_after(sent, async |leaving: Leaving| {
            let mut body = leaving.channel.send(post("x")).await.expect("a head").body;
            if sent == HEAD_AND_CHUNK {
                assert_eq!(body.next().await.expect("a piece").expect("bytes"), "data: 1\n\n");
            }
            assert!(futures::poll!(Box::pin(body.next())).is_pending());
            leaving.left.send(Instant::now()).expect("a waiting test");
            drop(body);
            assert_eq!(leaving.channel.idle_connections(), 0);
        })
        .await;
        assert!(took < millis(100), "{took:?}");
    }
}

#[tokio::test]
async fn leaving_with_bytes_unread_closes_at_once() {
    let took = closed_after(HEAD_AND_CHUNK, async |leaving: Leaving| {
        let body = leaving.channel.send(post("x")).await.expect("a head").body;
        leaving.left.send(Instant::now()).expect("a waiting test");
        drop(body);
    })
    .await;
    assert!(took < millis(100), "{took:?}");
}

#[tokio::test]
async fn leaving_while_the_request_is_stuck_sends_no_more_of_it() {
    // More than the kernel's buffers hold, to a worker that does not read.
    const BYTES: usize = 64 << 20;
    for early_answer in ["", HEAD_AND_CHUNK] {
        let (leave, left) = oneshot::channel::<()>();
        let (count, counted) = oneshot::channel();
        let ends = parking_lot::Mutex::new(Some((left, count)));
        let server = Server::start(move |mut served| {
            let ends = ends.lock().take();
            async move {
                let (left, count) = ends.expect("one connection");
                served.send(early_answer).await;
                left.await.expect("the test leaves");
                let (mut bytes, mut buffer) = (0, vec![0; 1 << 20]);
                while let Ok(read @ 1..) = served.stream.read(&mut buffer).await {
                    bytes += read;
                }
                count.send(bytes).expect("a waiting test");
            }
        })
        .await;
        let channel = server.channel(Timeouts::default());
        let mut sending = Box::pin(channel.send(post(vec![b'x'; BYTES])));
        if early_answer.is_empty() {
            assert!(timeout(millis(100), &mut sending).await.is_err(), "the server says nothing");
            drop(sending);
        } else {
            let mut body = sending.await.expect("a head").body;
            body.next().await.expect("a piece").expect("bytes");
            drop(body);
        }
        leave.send(()).expect("a waiting server");
        let bytes = timeout(PATIENCE, counted).await.expect("the server sees the end").expect("the server lives");
        assert!(bytes < BYTES / 2, "{bytes} bytes went out");
    }
}

#[tokio::test]
async fn a_reader_that_pauses_holds_the_worker_back() {
    let server = Server::start(|mut served| async move {
        served.request().await;
        served.send(HEAD).await;
        let chunk = format!("10000\r\n{}\r\n", "x".repeat(0x10000));
        loop {
            // Stuck once all buffers on the way are full; counted by the number of records.
            served.send(&chunk).await;
            let record = served.seen.requests.lock()[0].clone();
            served.seen.requests.lock().push(record);
        }
    })
    .await;
    let mut body = server.channel(Timeouts::default()).send(post("x")).await.expect("a head").body;
    body.next().await.expect("a piece").expect("bytes");
    let mut sent = 0;
    // The kernel's buffers grow by themselves; ours must not: at some point nothing more goes out.
    loop {
        tokio::time::sleep(millis(100)).await;
        let now = server.seen.requests();
        if now == sent {
            break;
        }
        sent = now;
        assert!(sent < 1024, "64 MiB went out with no one reading");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// However the answer is cut on the wire, the same bytes come out.
    #[test]
    fn pieces_join_to_the_same_bytes(
        chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..300), 0..12),
        cut in 1_usize..64,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let expected = chunks.concat();
        let got = runtime.block_on(async move {
            let server = Server::start(move |mut served| {
                let mut wire = HEAD.as_bytes().to_vec();
                for chunk in &chunks {
                    wire.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
                    wire.extend_from_slice(chunk);
                    wire.extend_from_slice(b"\r\n");
                }
                wire.extend_from_slice(b"0\r\n\r\n");
                async move {
                    served.request().await;
                    for piece in wire.chunks(cut) {
                        served.send(piece).await;
                        tokio::task::yield_now().await;
                    }
                    served.closed().await;
                }
            })
            .await;
            let channel = server.channel(Timeouts::default());
            let got = read(channel.send(post("x")).await.expect("a head").body).await.expect("a body");
            assert_eq!(channel.idle_connections(), 1);
            got
        });
        prop_assert_eq!(got, expected);
    }
}

//! x
#![allow(missing_docs)]
use std::time::{Instant,Duration};
fn each(name:&str, f: impl Fn()) { let mut best=f64::MAX; for _ in 0..30 { let n=20000; let s=Instant::now(); for _ in 0..n { f(); } best=best.min(s.elapsed().as_nanos() as f64/n as f64);} println!("{name:<30} {best:.1}"); }
fn main(){
 let rt=tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
 let _g=rt.enter();
 each("instant::now", || { std::hint::black_box(Instant::now()); });
 each("tokio instant::now", || { std::hint::black_box(tokio::time::Instant::now()); });
 let t=tokio::time::Instant::now()+Duration::from_secs(30);
 each("sleep_until", || { std::hint::black_box(tokio::time::sleep_until(t)); });
 let a=std::sync::Arc::new(5); each("arc clone", || { std::hint::black_box(a.clone()); });
 let m=std::sync::Mutex::new(5); each("std lock", || { *std::hint::black_box(m.lock().unwrap())+=1; });
 println!("sleep size {}", size_of::<tokio::time::Sleep>());
}
